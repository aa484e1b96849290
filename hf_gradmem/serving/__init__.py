"""A server of memories: contexts are written and questions answered over HTTP, as OpenAI's clients ask for it."""
