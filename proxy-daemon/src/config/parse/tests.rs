//! Configuration in, model or error out.
