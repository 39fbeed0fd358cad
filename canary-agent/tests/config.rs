//! The configuration from outside: what texts and files become.

mod config {
    mod cases;
    mod documents;
    mod files;
    mod meaning;
    mod places;
    mod properties;
    mod support;
}
