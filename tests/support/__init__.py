"""What several tests share: tiny models and tiny prepared data, made from seeds."""
