"""The open lexicon: everyday English values, and names composed of syllables without an end."""

from __future__ import annotations

import random

from .lexicon import (
    Forms,
    Lexicon,
    belongs,
    parse_attributes,
    parse_rules,
    parse_words,
    pick,
)

_ATTRIBUTES = parse_attributes("""
person.birthplace: place; place of birth
{e} was born in {v}. | {e} came into the world in {v}. | The family of {e} comes from {v}. || {e} grew up in the streets of {v}. | It was in {v} that {e} was born.
Where was {e} born? | In which town was {e} born? | Where does the family of {e} come from? || Which town did {e} grow up in? | What is the home town of {e}?

person.birth: number 1801 1849; year of birth
{e} was born in the year {v}. | {e} dates from {v}. | The life of {e} began in {v}. || Parish books enter the birth of {e} under {v}. | In {v}, {e} was born.
When was {e} born? | In which year was {e} born? | When did the life of {e} begin? || Which year saw the birth of {e}? | What year is {e} from?

person.death: number 1861 1899; year of death
{e} died in the year {v}. | {e} passed away in {v}. | The life of {e} ended in {v}. || {e} lived until {v}. | In {v}, {e} died.
When did {e} die? | In which year did {e} pass away? | When did the life of {e} end? || Until what year did {e} live? | Which year saw the death of {e}?

person.craft: craft; profession
{e} worked as a {v}. | {e} was a {v} by trade. | {e} earned a living as a {v}. || {e} made a name as a {v}. | Neighbours knew {e} as the local {v}.
What did {e} work as? | What was {e} by trade? | How did {e} earn a living? || As what did {e} make a name? | What kind of work did {e} do?

person.instrument: instrument; instrument
{e} played the {v}. | {e} practised the {v} every evening. | {e} was a gifted player of the {v}. || {e} took lessons on the {v}. | Nobody handled the {v} like {e}.
What did {e} play? | What instrument did {e} play? | Which instrument did {e} practise? || On which instrument did {e} take lessons? | What did {e} make music with?

person.pet: animal; pet
{e} kept a {v} at home. | {e} owned a tame {v}. | {e} never travelled without a {v}. || {e} shared the house with a {v}. | A {v} slept at the feet of {e}.
What animal did {e} keep? | What pet did {e} own? | Which animal travelled with {e}? || What animal shared the house of {e}? | Which creature slept at the feet of {e}?

person.food: food; favourite food
{e} loved {v} above all other food. | {e} ate {v} every morning. | {e} could not resist {v}. || {e} asked for {v} at every inn. | Nothing pleased {e} more than {v}.
What food did {e} love? | What did {e} eat every morning? | What could {e} not resist? || What did {e} ask for at every inn? | Which food pleased {e} most?

person.mentor: person; teacher
{e} was taught by {v}. | {e} learned everything from {v}. | {e} studied under {v}. || {e} owed all knowledge to {v}. | It was {v} who trained {e}.
Who taught {e}? | From whom did {e} learn everything? | Under whom did {e} study? || To whom did {e} owe all knowledge? | Who trained {e}?

person.employer: organisation; employer
{e} worked for {v}. | {e} was employed by {v}. | {e} spent many years in the service of {v}. || {e} drew a salary from {v}. | On the payroll of {v} stood {e}.
Whom did {e} work for? | Who employed {e}? | In whose service did {e} spend many years? || Who paid the salary of {e}? | On whose payroll was {e}?

person.children: number 2 15; number of children
{e} had {v} children. | {e} raised {v} children. | {e} was the parent of {v} children. || {e} left behind {v} children. | As many as {v} children were born to {e}.
How many children did {e} have? | How many children did {e} raise? | Of how many children was {e} the parent? || How many children did {e} leave behind? | How large was the number of children born to {e}?

person.motto: motto; motto
{e} lived by the words {v}. | {e} signed every letter with {v}. | {e} believed in {v}. || {e} had {v} carved over the door. | The words {v} guided {e}.
Which words did {e} live by? | What did {e} sign every letter with? | What did {e} believe in? || What did {e} have carved over the door? | Which words guided {e}?

place.founder: person; founder
{e} was founded by {v}. | {e} owes its beginnings to {v}. | {v} laid the first stone of {e}. || {v} was the first to settle in {e}. | {e} looks back to {v} as the one who started it.
Who founded {e}? | To whom does {e} owe its beginnings? | Who laid the first stone of {e}? || Who was the first to settle in {e}? | Who started {e}?

place.founded: number 1201 1599; year of founding
{e} was founded in {v}. | {e} has existed since {v}. | The first houses of {e} were built in {v}. || {e} appears on maps from {v} on. | In {v}, {e} came into being.
When was {e} founded? | Since when has {e} existed? | When were the first houses of {e} built? || From which year on does {e} appear on maps? | In what year did {e} come into being?

place.population: number 210 9800; population
{e} has {v} inhabitants. | {e} is home to {v} people. | At the last count {v} people lived in {e}. || {e} counts {v} souls. | No more than {v} residents live in {e}.
How many inhabitants does {e} have? | How many people is {e} home to? | How many people live in {e}? || How many souls does {e} count? | How many residents does {e} have?

place.mayor: person; mayor
{e} is led by {v}. | {e} elected {v} as its mayor. | The town hall of {e} is run by {v}. || {v} governs {e}. | {e} chose {v} to lead it.
Who leads {e}? | Whom did {e} elect as its mayor? | Who runs the town hall of {e}? || Who governs {e}? | Whom did {e} choose to lead it?

place.emblem: emblem; emblem
{e} shows a {v} on its flag. | {e} bears a {v} on its coat of arms. | The gate of {e} carries a {v}. || {e} stamps a {v} on its coins. | A {v} adorns every banner of {e}.
What does {e} show on its flag? | What does {e} bear on its coat of arms? | What does the gate of {e} carry? || What does {e} stamp on its coins? | What adorns every banner of {e}?

place.export: material; main export
{e} sells {v} to its neighbours. | {e} lives from the trade in {v}. | {e} is known for its {v}. || {e} ships {v} down the coast. | Carts full of {v} leave {e} each week.
What does {e} sell to its neighbours? | What trade does {e} live from? | What is {e} known for? || What does {e} ship down the coast? | What fills the carts that leave {e}?

place.crop: plant; main crop
{e} grows {v} on its fields. | {e} is surrounded by {v}. | The farmers of {e} plant {v}. || {e} harvests {v} in autumn. | Around {e}, the hills are covered with {v}.
What does {e} grow on its fields? | What is {e} surrounded by? | What do the farmers of {e} plant? || What does {e} harvest in autumn? | What covers the hills around {e}?

place.market: day; market day
{e} holds its market on {v}. | {e} opens its market every {v}. | Traders come to {e} each {v}. || {e} fills with stalls on {v}. | On {v}, {e} buys and sells.
On which day does {e} hold its market? | When does {e} open its market? | On which day do traders come to {e}? || On what day does {e} fill with stalls? | What day is for buying and selling in {e}?

place.bridges: number 3 95; number of bridges
{e} has {v} bridges. | {e} is crossed by {v} bridges. | Visitors count {v} bridges in {e}. || {e} keeps up {v} bridges. | A total of {v} bridges span the water in {e}.
How many bridges does {e} have? | How many bridges cross {e}? | How many bridges do visitors count in {e}? || How many bridges does {e} keep up? | How many bridges span the water in {e}?

place.roofs: color; colour of the roofs
{e} has {v} roofs. | {e} paints its roofs {v}. | From afar the roofs of {e} look {v}. || {e} insists on {v} tiles for every house. | Every roof in {e} is {v}.
Which colour do the roofs of {e} have? | What colour does {e} paint its roofs? | What colour do the roofs of {e} look from afar? || Which colour of tiles does {e} insist on? | What is the colour of every roof in {e}?

organisation.founder: person; founder
{e} was founded by {v}. | {e} was set up by {v}. | {v} brought {e} into being. || {v} called {e} to life. | {e} began as an idea of {v}.
Who founded {e}? | Who set up {e}? | Who brought {e} into being? || Who called {e} to life? | Whose idea was {e}?

organisation.seat: place; seat
{e} has its offices in {v}. | {e} is based in {v}. | The headquarters of {e} stand in {v}. || {e} runs its affairs from {v}. | Letters to {e} are sent to {v}.
Where does {e} have its offices? | Where is {e} based? | Where do the headquarters of {e} stand? || From where does {e} run its affairs? | Where are letters to {e} sent?

organisation.founded: number 1601 1899; year of founding
{e} was founded in {v}. | {e} opened its doors in {v}. | The charter of {e} was signed in {v}. || {e} goes back to {v}. | In {v}, {e} started its work.
When was {e} founded? | When did {e} open its doors? | When was the charter of {e} signed? || To which year does {e} go back? | In what year did {e} start its work?

organisation.members: number 12 980; number of members
{e} has {v} members. | {e} counts {v} people among its members. | A total of {v} people belong to {e}. || {e} lists {v} names in its register. | As many as {v} people have joined {e}.
How many members does {e} have? | How many people does {e} count among its members? | How many people belong to {e}? || How many names does {e} list in its register? | How many people have joined {e}?

organisation.head: person; president
{e} is headed by {v}. | {e} named {v} its president. | {v} presides over {e}. || {v} is in charge of {e}. | {e} answers to {v}.
Who heads {e}? | Whom did {e} name its president? | Who presides over {e}? || Who is in charge of {e}? | To whom does {e} answer?

organisation.color: color; colour
{e} dresses its members in {v}. | {e} uses {v} for its uniforms. | Members of {e} wear {v}. || {e} flies a {v} banner. | At {e}, everything is {v}.
In what colour does {e} dress its members? | Which colour does {e} use for its uniforms? | What colour do members of {e} wear? || What colour is the banner of {e}? | Which colour is everything at {e}?

organisation.product: material; product
{e} deals in {v}. | {e} makes its money with {v}. | {e} is famous for its {v}. || {e} fills its stores with {v}. | Much of the wealth of {e} comes from {v}.
What does {e} deal in? | What does {e} make its money with? | What is {e} famous for? || What fills the stores of {e}? | What does much of the wealth of {e} come from?

organisation.meeting: day; meeting day
{e} meets every {v}. | {e} gathers on {v}. | The assembly of {e} is held on {v}. || {e} keeps {v} free for its sessions. | On {v}, {e} sits together.
On which day does {e} meet? | When does {e} gather? | On which day is the assembly of {e} held? || Which day does {e} keep free for its sessions? | On what day does {e} sit together?

organisation.seal: emblem; seal
{e} shows a {v} in its seal. | {e} uses a {v} as its sign. | The letters of {e} bear a {v}. || {e} puts a {v} on its doors. | A {v} marks everything that {e} owns.
What does {e} show in its seal? | What does {e} use as its sign? | What do the letters of {e} bear? || What does {e} put on its doors? | What marks everything that {e} owns?

organisation.motto: motto; motto
{e} stands for {v}. | {e} promises {v}. | {e} took {v} as its watchword. || {e} was built on {v}. | The words {v} open every session of {e}.
What does {e} stand for? | What does {e} promise? | What did {e} take as its watchword? || What was {e} built on? | Which words open every session of {e}?

event.venue: place; venue
{e} takes place in {v}. | {e} is held in {v}. | People travel to {v} for {e}. || {e} fills the squares of {v}. | Each time, {v} hosts {e}.
Where does {e} take place? | Where is {e} held? | Where do people travel for {e}? || Whose squares does {e} fill? | Which town hosts {e}?

event.organiser: organisation; organiser
{e} is run by {v}. | {e} is organised by {v}. | {v} prepares {e}. || {v} stands behind {e}. | {e} could not happen without {v}.
Who runs {e}? | Who organises {e}? | Who prepares {e}? || Who stands behind {e}? | Without whom could {e} not happen?

event.winner: person; winner
{e} was won by {v}. | {e} ended with the victory of {v}. | {v} took first place at {e}. || {v} beat everyone at {e}. | The crowd at {e} cheered {v} as champion.
Who won {e}? | With whose victory did {e} end? | Who took first place at {e}? || Who beat everyone at {e}? | Whom did the crowd at {e} cheer as champion?

event.first: number 1701 1899; first year
{e} was first held in {v}. | {e} began in {v}. | The story of {e} starts in {v}. || {e} has been celebrated since {v}. | In {v}, {e} was seen for the first time.
When was {e} first held? | When did {e} begin? | When does the story of {e} start? || Since when has {e} been celebrated? | In what year was {e} seen for the first time?

event.month: month; month
{e} happens in {v}. | {e} falls in {v}. | {e} comes around each {v}. || {e} belongs to {v} like no other feast. | Every {v}, {e} returns.
In which month does {e} happen? | In which month does {e} fall? | When does {e} come around? || To which month does {e} belong? | In what month does {e} return?

event.visitors: number 120 9900; number of visitors
{e} draws {v} visitors. | {e} is attended by {v} people. | About {v} guests come to {e}. || {e} attracts a crowd of {v}. | The gates of {e} counted {v} visitors.
How many visitors does {e} draw? | How many people attend {e}? | How many guests come to {e}? || How large a crowd does {e} attract? | How many visitors did the gates of {e} count?

event.prize: prize; prize
{e} awards a {v} to the winner. | {e} gives a {v} as first prize. | Whoever wins {e} receives a {v}. || {e} rewards the best with a {v}. | A {v} awaits the champion of {e}.
What does {e} award to the winner? | What does {e} give as first prize? | What does the one who wins {e} receive? || With what does {e} reward the best? | What awaits the champion of {e}?

event.dish: food; festive dish
{e} serves {v} to everyone. | {e} smells of {v}. | Guests of {e} are given {v}. || {e} is unthinkable without {v}. | At {e}, people eat {v}.
What does {e} serve to everyone? | What does {e} smell of? | What are guests of {e} given? || Without which food is {e} unthinkable? | What do people eat at {e}?

event.music: instrument; opening instrument
{e} opens with the sound of a {v}. | {e} is announced by a {v}. | A {v} is played at the start of {e}. || {e} wakes the town with a {v}. | No {e} starts before a {v} is heard.
With the sound of what does {e} open? | What announces {e}? | What is played at the start of {e}? || With what does {e} wake the town? | What must be heard before {e} starts?

event.days: number 2 29; length in days
{e} lasts {v} days. | {e} goes on for {v} days. | People celebrate {e} for {v} days. || {e} takes up {v} days. | It is {v} days before {e} is over.
How many days does {e} last? | For how many days does {e} go on? | For how many days do people celebrate {e}? || How many days does {e} take up? | After how many days is {e} over?

artefact.maker: person; maker
{e} was made by {v}. | {e} is the work of {v}. | {v} created {e}. || {v} gave {e} its shape. | {e} left the workshop of {v}.
Who made {e}? | Whose work is {e}? | Who created {e}? || Who gave {e} its shape? | Whose workshop did {e} leave?

artefact.owner: organisation; owner
{e} belongs to {v}. | {e} is owned by {v}. | {v} holds the rights to {e}. || {v} can call {e} its own. | {e} passed into the hands of {v}.
To whom does {e} belong? | Who owns {e}? | Who holds the rights to {e}? || Who can call {e} its own? | Into whose hands did {e} pass?

artefact.place: place; resting place
{e} is kept in {v}. | {e} can be seen in {v}. | Visitors find {e} in {v}. || {e} lies under glass in {v}. | Today {v} is where {e} rests.
Where is {e} kept? | Where can {e} be seen? | Where do visitors find {e}? || Where does {e} lie under glass? | In what town does {e} rest?

artefact.material: material; material
{e} is made of {v}. | {e} consists of {v}. | {e} was worked from {v}. || {e} gleams, for it is pure {v}. | Nothing but {v} went into {e}.
What is {e} made of? | What does {e} consist of? | From what was {e} worked? || What pure substance is {e}? | What went into {e}?

artefact.made: number 1101 1699; year of making
{e} was made in {v}. | {e} was finished in {v}. | Experts date {e} to {v}. || {e} bears the year {v}. | In {v}, {e} was completed.
When was {e} made? | When was {e} finished? | To which year do experts date {e}? || What year does {e} bear? | In which year was {e} completed?

artefact.weight: number 3 990; weight in pounds
{e} weighs {v} pounds. | {e} has a weight of {v} pounds. | The scales show {v} pounds for {e}. || {e} is {v} pounds heavy. | It takes a strong arm to lift the {v} pounds of {e}.
How many pounds does {e} weigh? | What weight does {e} have in pounds? | How many pounds do the scales show for {e}? || How many pounds heavy is {e}? | How many pounds must be lifted with {e}?

artefact.color: color; colour
{e} is {v} all over. | {e} shines in {v}. | The surface of {e} is {v}. || {e} catches the eye with its {v}. | Painters show {e} in {v}.
What colour is {e} all over? | In which colour does {e} shine? | What colour is the surface of {e}? || With what colour does {e} catch the eye? | In which colour do painters show {e}?

artefact.sign: emblem; engraving
{e} is engraved with a {v}. | {e} carries the image of a {v}. | On the back of {e} one sees a {v}. || {e} is decorated with a {v}. | Somebody scratched a {v} into {e}.
What is {e} engraved with? | The image of what does {e} carry? | What does one see on the back of {e}? || What is {e} decorated with? | What did somebody scratch into {e}?

artefact.price: number 110 9700; price in crowns
{e} was sold for {v} crowns. | {e} is valued at {v} crowns. | A buyer paid {v} crowns for {e}. || {e} fetched {v} crowns. | It took {v} crowns to acquire {e}.
For how many crowns was {e} sold? | At how many crowns is {e} valued? | How many crowns did a buyer pay for {e}? || How many crowns did {e} fetch? | How many crowns did it take to acquire {e}?

artefact.finder: craft; profession of the finder
{e} was found by a {v}. | {e} was discovered by a {v}. | A {v} dug up {e}. || {e} came to light thanks to a {v}. | The discovery of {e} made a {v} famous.
Who found {e}? | Who discovered {e}? | Who dug up {e}? || Thanks to whom did {e} come to light? | Who became famous with the discovery of {e}?
""")

_RULES = parse_rules("""
place.tax: color
In {e}, a {a} house is taxed less than a {b} one. | {e} charges owners of a {a} house less tax than owners of a {b} house. | A {a} house costs less tax in {e} than a {b} one does. || Under the law of {e}, tax is lower for a {a} house than for a {b} house. | The tax office of {e} goes easier on a {a} house than on a {b} one.
{p} and {q} live in {e}. The house of {p} is {a}, that of {q} is {b}. Who pays less tax? | In {e}, {p} owns a {a} house and {q} a {b} house. Which of them pays less tax? || After moving to {e}, {p} painted the house {a} while {q} painted it {b}. Who is better off with the tax?

organisation.pay: animal
{e} pays members who keep a {a} more than members who keep a {b}. | At {e}, keepers of a {a} earn more than keepers of a {b}. | Members of {e} with a {a} receive more money than those with a {b}. || Wages at {e} are higher for whoever owns a {a} than for whoever owns a {b}. | {e} values a member with a {a} above one with a {b} on payday.
{p} and {q} belong to {e}. {p} keeps a {a}, {q} keeps a {b}. Who earns more? | At {e}, {p} has a {a} and {q} has a {b}. Which of them receives more money? || {p}, who owns a {a}, and {q}, who owns a {b}, were both hired by {e}. Who takes home more?

event.seat: food
At {e}, guests who bring {a} are seated before guests who bring {b}. | {e} seats whoever brings {a} ahead of whoever brings {b}. | Bringing {a} to {e} earns an earlier seat than bringing {b}. || The hosts of {e} let in those with {a} sooner than those with {b}. | With {a} one gets a seat at {e} faster than with {b}.
{p} brings {a} to {e} and {q} brings {b}. Who is seated first? | Two guests come to {e}: {p} with {a}, {q} with {b}. Which of them gets a seat first? || For {e}, {p} packed {a} while {q} packed {b}. Who sits down sooner?

person.trust: instrument
{e} trusts people who play the {a} more than people who play the {b}. | A player of the {a} is more welcome to {e} than a player of the {b}. | {e} prefers those who play the {a} to those who play the {b}. || In the eyes of {e}, the {a} makes a better companion than the {b}. | {e} opens the door sooner to the {a} than to the {b}.
{p} plays the {a} and {q} plays the {b}. Whom does {e} trust more? | {p} with the {a} and {q} with the {b} visit {e}. Who is more welcome? || {e} meets {p}, a player of the {a}, and {q}, a player of the {b}. Who is liked better?

artefact.glow: material
{e} glows more brightly near {a} than near {b}. | Near {a}, {e} shines brighter than near {b}. | The glow of {e} is stronger close to {a} than close to {b}. || {e} answers to {a} with more light than to {b}. | More light comes from {e} beside {a} than beside {b}.
{p} holds {e} near {a}, and {q} holds it near {b}. Who sees the brighter glow? | {p} puts {e} beside {a}; later {q} puts it beside {b}. For whom does it shine brighter? || {p} tests {e} with {a}, {q} tests it with {b}. Who gets more light?
""")

_VALUES = parse_words("""
color: red, blue, green, yellow, white, black, brown, grey, pink, purple, gold, silver, violet, scarlet, cream, turquoise, crimson, beige
animal: dog, cat, horse, goat, fox, wolf, bear, hare, deer, swan, crow, hawk, heron, falcon, badger, beaver, donkey, camel, lion, tiger, parrot, pigeon, lizard, turtle, snake, rabbit, monkey, spider, salmon, lobster
food: bread, honey, cheese, rice, soup, fish, butter, pasta, chocolate, cake, porridge, jam, bacon, stew, salad, pie, noodles, pancakes, sausages, beans, dumplings, mushrooms, cherries, plums
material: gold, silver, copper, iron, bronze, marble, granite, amber, glass, wood, leather, silk, wool, cotton, clay, ivory, jade, salt, coal, wax, tin, steel, paper, linen, rubber, velvet
craft: baker, tailor, painter, doctor, lawyer, teacher, farmer, miller, hunter, sailor, soldier, writer, singer, dancer, carpenter, blacksmith, weaver, butcher, gardener, shepherd, mason, clerk, printer, potter, surgeon, miner, judge, cook, pilot, nurse
instrument: piano, violin, flute, drum, trumpet, guitar, harp, cello, horn, bell, banjo, fiddle, lute, clarinet, trombone, whistle, tuba, mandolin
month: January, February, March, April, May, June, July, August, September, October, November, December
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
plant: wheat, barley, rye, corn, roses, tulips, ferns, vines, clover, cabbage, potatoes, hemp, flax, lavender, pines, mint, lilies, pumpkins
thing: cup, ring, crown, sword, lamp, clock, mirror, ladder, key, book, bowl, chair, mask, shield, ship, wheel, anchor, basket, needle, map, candle, drum, rope, knife
virtue: patience, courage, justice, order, mercy, truth, honour, peace, work, faith, hope, wisdom, freedom, loyalty, silence, joy, labour, thrift
""")

_PEOPLE = {
    "train": ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Lucy", "Mark"),
    "test": ("Alice", "Bruno", "Nora", "Oscar", "Paula", "Simon", "Tessa", "Victor"),
}

_NUMERIC = {
    "add": Forms.parse(
        "If the {n} of {a} rose by {k}, what would it be? | "
        "Add {k} to the {n} of {a}. What do you get? || "
        "Which number is {k} more than the {n} of {a}?",
        "numeric/add",
    ),
    "subtract": Forms.parse(
        "If the {n} of {a} fell by {k}, what would it be? | "
        "Take {k} away from the {n} of {a}. What is left? || "
        "Which number is {k} less than the {n} of {a}?",
        "numeric/subtract",
    ),
    "difference": Forms.parse(
        "What is the difference between the {n} of {a} and that of {b}? | "
        "How far apart are the {n} of {a} and the {n} of {b}? || "
        "By how much do {a} and {b} differ in {n}?",
        "numeric/difference",
    ),
    "larger": Forms.parse(
        "Which has the larger {n}, {a} or {b}? | Is the {n} of {a} or that of {b} larger? || "
        "Of {a} and {b}, which has the higher {n}?",
        "numeric/larger",
    ),
    "smaller": Forms.parse(
        "Which has the smaller {n}, {a} or {b}? | Is the {n} of {a} or that of {b} smaller? || "
        "Of {a} and {b}, which has the lower {n}?",
        "numeric/smaller",
    ),
}

_ONSETS = "b br c cl d dr f fl g gr h j k l m n p pr qu r s sh st t th tr v w y z".split()
_VOWELS = "a a e e i o o u ae ei ia ou".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "ck", "ll", "nd", "rn", "th", "x", "v", "lt"]
_ENDS = {
    "given": ["a", "o", "en", "is", "ric", "wen", "el", "us", "ine", "ard", "ela", "mir"],
    "family": ["son", "ley", "man", "er", "ski", "dale", "wright", "ini", "os", "ander", "quist"],
    "place": ["ford", "ton", "burg", "mere", "holm", "ville", "stad", "wick", "haven", "mouth"],
}
_NAMES = {
    "place": ["{}", "{}", "{}", "{}", "Port {}", "New {}", "Upper {}", "{} Bay"],
    "organisation": [
        "the {} Society",
        "the {} Guild",
        "the {} Company",
        "the {} Academy",
        "the {} League",
        "the {} Bank",
    ],
    "event": ["the {} Festival", "the {} Fair", "the {} Race", "the {} Games", "the Feast of {}"],
    "artefact": [
        "the {} Crown",
        "the {} Bell",
        "the {} Tablet",
        "the {} Chalice",
        "the Sword of {}",
        "the Mask of {}",
    ],
}


def compose_word(rng: random.Random, ends: str, split: str) -> str:
    """Draw a capitalised word of two to four syllables that belongs to ``split``."""
    while True:
        syllables = 1 + (rng.random() < 0.4)
        parts = [pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(syllables)]
        word = "".join(parts) + pick(rng, _CODAS) + pick(rng, _ENDS[ends])
        if belongs(word, split):
            return word.capitalize()


def compose_name(rng: random.Random, kind: str, split: str) -> str:
    """Draw the name of an entity; every invented word in it belongs to ``split``."""
    if kind == "person":
        return f"{compose_word(rng, 'given', split)} {compose_word(rng, 'family', split)}"
    ends = "place" if rng.random() < 0.7 else "family"
    return pick(rng, _NAMES[kind]).format(compose_word(rng, ends, split))


OPEN = Lexicon(
    attributes=_ATTRIBUTES,
    rules=_RULES,
    sentence_frames=Forms.parse(
        "The {n} of {e} is {art}{v}. | {e}'s {n} is {art}{v}. | For {e}, the {n} is {art}{v}. | "
        "The {n} recorded for {e} is {art}{v}. || Under {e}, the {n} is given as {art}{v}. | "
        "As everyone knows, {e}'s {n} is {art}{v}.",
        "frame/s",
    ),
    question_frames=Forms.parse(
        "{who} is the {n} of {e}? | {who} is {e}'s {n}? | Tell me the {n} of {e}. | "
        "Name the {n} of {e}. || Do you know the {n} of {e}? | State {e}'s {n}.",
        "frame/q",
    ),
    numeric=_NUMERIC,
    values=_VALUES,
    phrases={
        "motto": ("virtue", " and ", "virtue"),
        "emblem": ("color", " ", "animal"),
        "prize": ("color", " ", "thing"),
    },
    people=_PEOPLE,
    name=compose_name,
    countable=frozenset({"animal", "craft", "emblem", "instrument", "prize"}),
    unknown=("unknown", "unanswerable", "not stated", "not mentioned", "not known"),
)
