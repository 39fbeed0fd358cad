//! Questions about a record: `country.iso_code == "US" && subdivisions.0.iso_code == "IA"`.
//!
//! ```text
//! or      = and { "||" and }
//! and     = not { "&&" not }
//! not     = "!" not | "(" or ")" | test
//! test    = "exists" "(" field ")"
//!         | field [ ( "==" | "!=" | "<" | "<=" | ">" | ">=" ) value | "in" "[" value { "," value } "]" ]
//! field   = name { "." ( name | index ) }          a name may stand in quotes: names."zh-CN"
//! value   = "text" | number | true | false
//! ```
//!
//! `&&` binds closer than `||`. A field alone asks whether it is true. Of a field that a record
//! does not have, or that is of another kind there, every test is false, `!=` as well: nothing is
//! known of it. `!( … )` turns that into true, and `exists(…)` asks for it.
//!
//! Owns the text and its meaning over [`Value`]s. Must not know where records come from.

mod parse;
mod test;
mod value;

use std::ops::Range;

pub use parse::ExpressionError;
pub use test::{Asked, Kinds};
pub use value::Value;

/// A step from a value to one inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The value of a key.
    Key(String),
    /// An element of a list, from 0.
    Index(usize),
}

/// A field, and where it stands in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The way to it.
    pub steps: Vec<Step>,
    /// Bytes of the text.
    pub span: Range<usize>,
    /// Which of the expression's fields it is, counted from 0.
    pub number: usize,
}

/// What a field is compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum Literal {
    /// A text.
    Text(String),
    /// A number.
    Number(f64),
    /// A truth.
    Truth(bool),
}

/// How a field is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    Unequal,
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    More,
    /// `>=`
    AtLeast,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Or(Vec<Node>),
    And(Vec<Node>),
    Not(Box<Node>),
    Exists(Field),
    Is(Field),
    Compare(Field, Comparison, Literal),
    In(Field, Vec<Literal>),
}

/// A question about a record.
#[derive(Clone, Debug, PartialEq)]
pub struct Expression {
    text: String,
    root: Node,
    fields: usize,
}

impl Expression {
    /// The text that it was read from.
    pub fn text(&self) -> &str {
        &self.text
    }
}
