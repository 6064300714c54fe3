"""Bodies of the OpenAI surface: what a replica decodes, and what `/llmcloud/v1/openapi.json` describes."""
