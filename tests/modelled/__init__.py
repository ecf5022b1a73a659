"""Random programs on machines of any kind, against one naive model.

program.py   what a program is, and how one is made from a seed
model.py     what has to come of it
player.py    runs a program on a machine, and compares the machine with the model
host.py      what the host does with memory, and a listener
machines.py  the machines: the fake, and guests on /dev/kvm
saved.py     programs with snapshots, resumes and resets, on any machine, and a model of their bytes
search.py    many programs, and a small one of one that fails
"""
