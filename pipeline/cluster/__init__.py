"""Where it runs: ranks, devices and the process group."""
