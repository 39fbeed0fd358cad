//! What the tests are made of: the loaded program, namespaces, servers, clients.

pub mod loaded;
