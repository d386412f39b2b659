//! Updates in, calls to the data plane and answers to the control plane out.
