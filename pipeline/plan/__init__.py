"""What will run: settings x model shape x hardware -> Plan. No torch; answers on a login node in under a second."""
