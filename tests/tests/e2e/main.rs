//! End to end: the real agent on a real balancer, real servers and clients, real
//! packets between them, in network namespaces of each test's own.

mod backends;
mod bad_input;
mod commands;
mod crashes;
mod crowd;
mod disks;
mod doctor;
mod explain;
mod flood;
mod fresh;
mod held;
mod hosts;
mod interrupted;
mod killed;
mod lacking;
mod latency;
mod lifecycle;
mod open_connections;
mod packaged;
mod panic;
mod passes;
mod payloads;
mod pressure;
mod quic;
mod quic_peer;
mod reload;
mod reused;
mod service;
mod soak;
mod sound;
mod splits;
mod stickiness;
mod support;
mod udp;
mod upgrade;
