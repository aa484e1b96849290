"""How the base decoder is run: through public calls, with what a path needs to know of it probed, not looked up."""
