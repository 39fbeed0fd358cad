//! Audiences: named sets of client networks.
//!
//! Owns what an audience consists of: networks as they are written ([`network`]), files of them
//! ([`file`]), what a MaxMind DB file says of whole networks ([`mmdb`], asked by an
//! [`expression`]), members with a lifetime ([`members`]), and the classes of clients that routes
//! make of them ([`routes`]). Must not know of splits, the configuration's form, the clock, or how classes reach the kernel: that is the compiler's ([`canary_ebpf_common::networks`]).

pub mod expression;
pub mod file;
pub mod members;
pub mod mmdb;
pub mod network;
pub mod routes;

pub use network::Networks;
