"""Lint's rules, by what they look at. `table.RULES` lists them all; a new rule is an entry there and a fixture in the tests."""
