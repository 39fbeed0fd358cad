//! The control socket, the TCP listener, the metrics page and the commands, each
//! over real sockets with a scripted loop behind them.

mod cli;
mod control;
mod metrics;
mod process;
mod rollout;
mod server;
mod support;
mod watch;
