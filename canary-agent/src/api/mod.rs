//! The control socket's routes.
pub mod model;
