"""What clients of a server see under load, over HTTP. Imports core, host, show and text: no engine, no torch."""
