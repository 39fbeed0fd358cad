//! What the agent says about itself: metrics and logs.
//!
//! Metrics are made from a [`Status`](crate::api::model::Status) and a few things
//! that only the process knows ([`Metrics`]). Must not know of maps or sockets.

mod collect;
mod logs;
mod metrics;

pub use self::{
    logs::{LogFormat, init_logs},
    metrics::{Exposition, Metrics},
};
