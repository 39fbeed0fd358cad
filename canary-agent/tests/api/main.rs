//! The control socket, the TCP listener and the metrics page, each over real
//! sockets with a scripted loop behind them.

mod metrics;
mod server;
mod support;
