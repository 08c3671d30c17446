"""What several tests share: models, oracles, strategies, golden vectors."""
