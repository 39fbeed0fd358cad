//! Audiences from MaxMind DB files: which networks answer an expression, and what is said where it
//! does not fit the file.

mod select;
mod writer;
