"""VFIO: devices that the primary holds, and what they reach of the memory."""
