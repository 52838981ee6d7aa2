"""What a row says: a document, or the turns of a conversation."""
