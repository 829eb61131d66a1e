"""A seeded simulator of the scheduler: random work, a ghost of the pages, and every invariant after every step."""
