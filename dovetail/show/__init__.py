"""What people look at: progress bars, tables, plots. Imports core and host only."""
