"""Audits: attacks on the code that trains, and what their success proves about ε from below."""
