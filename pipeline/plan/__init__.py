"""What will run: settings x model shape x hardware -> Plan. No torch, under a second."""
