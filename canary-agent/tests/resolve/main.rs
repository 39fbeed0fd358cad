//! How the agent follows and changes its host's network, in network namespaces.
//!
//! Each test runs in a thread that has left the host's namespace, with its peers in
//! further ones. All of them go when their threads end, so runs do not meet.

mod follow;
mod host;
mod netns;
mod silence;
