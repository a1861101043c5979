"""Base models: found, loaded by the library that wrote them, with what their task needs."""
