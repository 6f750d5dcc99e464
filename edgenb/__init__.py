"From your own labelled examples to a small model that provably works on the device it ships to."
__version__ = '0.1.0'
