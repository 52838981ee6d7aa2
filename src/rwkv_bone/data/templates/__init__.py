"""How the turns of a conversation become text."""
