//! The agent of canary-xdp: a library and one binary, `canary-agent`.
//!
//! One loop ([`daemon`]) owns the state. Inputs become events; [`plan`] computes
//! the desired data plane from the whole state; [`datapath`] applies the
//! difference. No other task writes a map.

pub mod api;
pub mod audience;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod failpoint;
pub mod health;
pub mod hooks;
mod parallel;
pub mod plan;
pub mod resolve;
pub mod rollout;
pub mod signals;
pub mod store;
pub mod telemetry;
