"""What delivers a message into a chat."""
