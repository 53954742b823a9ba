"""What ``ModuleFamily`` stands on: calling a module as a pure function, and finding out whether it is one."""
