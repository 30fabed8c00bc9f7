"""Text in, text out: an assistant, a session, the terminal."""
