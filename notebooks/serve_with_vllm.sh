#!/usr/bin/env bash
# Serve documents with vLLM: export them as a LoRA, start the base, load the LoRA at run time, ask.
#
#   notebooks/serve_with_vllm.sh BASE QUESTION FILE...
#
# BASE is the hypernetwork's base as vLLM takes it: a folder or a hub name.  A server that listens
# on PORT (8000) already is used as it is.  vLLM loads ranks up to 512; RANK=64 reduces the export
# to that rank and tells the error.  MODEL names another hypernetwork, FOLDER where the LoRA goes.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
base=$1 question=$2
shift 2
folder=${FOLDER:-build/vllm/document} url=http://localhost:${PORT:-8000}

d2l export ${MODEL:+--model "$MODEL"} ${RANK:+--rank "$RANK"} "$@" "$folder"
rank=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["r"])' "$folder/adapter_config.json")
if [ "$rank" -gt 512 ]; then
    echo "error: rank $rank is more than vLLM loads; set RANK to 512 or less" >&2
    exit 2
fi

if ! curl --silent --fail "$url/health"; then
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve "$base" --port "${PORT:-8000}" \
        --enable-lora --max-lora-rank "$rank" &
    until curl --silent --fail "$url/health"; do
        kill -0 $! || { echo "error: vLLM did not start" >&2; exit 1; }
        sleep "${POLL_S:-2}"
    done
fi

post() {
    curl --silent --show-error --fail-with-body --header 'Content-Type: application/json' --data "$2" "$url/v1/$1"
}
name=$(basename "$folder")
post load_lora_adapter "$(python3 -c 'import json, sys
print(json.dumps({"lora_name": sys.argv[1], "lora_path": sys.argv[2]}))' "$name" "$(realpath "$folder")")"
echo
# the empty system message is what the hypernetworks were trained with; a template may refuse one
post chat/completions "$(python3 -c 'import json, sys
messages = [{"role": "system", "content": ""}, {"role": "user", "content": sys.argv[2]}]
print(json.dumps({"model": sys.argv[1], "messages": messages, "temperature": 0}))' "$name" "$question")"
echo
