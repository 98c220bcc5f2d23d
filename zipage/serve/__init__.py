"""An HTTP server of OpenAI's interface over `LLM`: `zipage serve MODEL`."""
