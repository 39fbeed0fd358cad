//! The test bench of canary-xdp: hosts in network namespaces, real servers and
//! clients in them, and the real agent.
//!
//! A test builds a [`topology`], starts a [`server`] on each backend and the
//! [`agent`] on the balancer, drives [`client`]s and compares what they saw with
//! what [`stats`] allows. Everything is a value that takes its piece of the
//! host away when it is dropped, also by a panic; what a killed process could
//! not take away, the next one [`sweep`]s. Names carry the process id, so two
//! runs at once do not meet.
//!
//! Functions of this crate panic where the bench itself fails: a test has no
//! use for an error that it can't act on, and a panic names the place.

pub mod agent;
pub mod asked;
pub mod binary;
pub mod bpf;
pub mod caller;
pub mod cases;
pub mod chatter;
pub mod client;
pub mod control;
pub mod differential;
pub mod door;
pub mod faulty;
pub mod flood;
pub mod floor;
pub mod footprint;
pub mod hold;
pub mod host;
pub mod http;
pub mod lacking;
pub mod loaded;
pub mod machine;
pub mod model;
pub mod names;
pub mod netns;
pub mod nginx;
pub mod notation;
pub mod planned;
pub mod process;
pub mod pulse;
pub mod rerun;
pub mod server;
pub mod spawn;
pub mod stack;
pub mod stats;
pub mod stream;
pub mod swarm;
pub mod sweep;
pub mod tables;
pub mod topology;
pub mod unprivileged;
pub mod wait;
pub mod wire;
pub mod workdir;
pub mod world;
pub mod xdp_pass;
