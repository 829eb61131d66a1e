"""The parts that model families are composed of."""
