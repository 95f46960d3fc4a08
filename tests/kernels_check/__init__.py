"""What the compilers make of every GPU kernel: registers, shared memory, spills, occupancy. Needs no GPU."""
