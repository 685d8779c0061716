"""SoftSAC's C++: what it computes, and how it is built where it runs."""
