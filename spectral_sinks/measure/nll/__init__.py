"""What an intervention costs, in nats. Also what it does to generated text."""
