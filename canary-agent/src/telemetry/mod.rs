//! What the agent says about itself: metrics and logs.
//!
//! Metrics are made from a [`Status`](crate::api::model::Status) and a few things
//! that only the process knows ([`Metrics`]). Must not know of maps or sockets.

mod collect;
mod journal;
mod logs;
mod metrics;
mod page;
mod repeats;

pub use self::{
    logs::{LogFormat, check_log_filter, init_logs, set_log_filter, tell_repeats},
    metrics::{Exposition, Metrics},
};
