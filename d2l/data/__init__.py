"""Tasks as token ids: documents, questions, answers, all generated from seeds."""
