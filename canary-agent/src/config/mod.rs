//! Text → validated model, with every error's place.
pub mod model;
pub use model::Config;
