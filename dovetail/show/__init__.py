"""Progress bars, tables and plots. Imports core and host only."""
