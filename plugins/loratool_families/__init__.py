"""The families that ship with loratool: one a file, each a plugin like anybody else's."""
