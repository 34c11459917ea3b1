"""What the machine and its system offer: files, memory, threads, units. Imports core's errors only."""
