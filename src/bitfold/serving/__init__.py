"""A server with OpenAI's interface: texts side by side on one decoder. Needs the extra `serve`."""
