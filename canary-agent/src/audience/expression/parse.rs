//! From text to expression, with the place of what is wrong.

use std::ops::Range;

use logos::Logos;

use super::{Comparison, Expression, Field, Literal, Node, Step};

/// Longest expression, in bytes.
const MAX_BYTES: usize = 4 << 10;
/// Deepest nesting of `(` and `!`.
const MAX_DEPTH: usize = 64;

/// What is wrong with an expression, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExpressionError {
    /// What is wrong.
    pub message: String,
    /// Bytes of the expression that it is about.
    pub span: Range<usize>,
    /// What to write instead.
    pub help: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Logos)]
#[logos(skip r"[ \t\r\n]+")]
enum Token {
    #[token("||")]
    Or,
    #[token("&&")]
    And,
    #[token("!")]
    Not,
    #[token("==")]
    Equal,
    #[token("!=")]
    Unequal,
    #[token("<=")]
    AtMost,
    #[token("<")]
    Less,
    #[token(">=")]
    AtLeast,
    #[token(">")]
    More,
    #[token("(")]
    Open,
    #[token(")")]
    Close,
    #[token("[")]
    OpenList,
    #[token("]")]
    CloseList,
    #[token(",")]
    Comma,
    #[token(".")]
    Dot,
    #[regex(r"[A-Za-z_][A-Za-z0-9_-]*")]
    Name,
    #[regex(r"[0-9]+", priority = 3)]
    Digits,
    #[regex(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")]
    Number,
    #[regex(r#""([^"\\\n]|\\.)*""#)]
    Text,
}

impl Expression {
    /// Reads an expression.
    ///
    /// ```
    /// use canary_agent::audience::expression::Expression;
    ///
    /// assert!(Expression::parse(r#"country.iso_code in ["US", "CA"] && !traits.is_anycast"#).is_ok());
    /// let error = Expression::parse(r#"country.iso_code = "US""#).unwrap_err();
    /// assert_eq!((error.span, error.help.as_deref()), (17..18, Some("write `==`")));
    /// ```
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, ExpressionError> {
        if text.len() > MAX_BYTES {
            let message =
                format!("an expression has at most {MAX_BYTES} bytes, this one {}", text.len());
            return Err(ExpressionError { message, span: 0..0, help: None });
        }
        let mut tokens = Vec::new();
        for (token, span) in Token::lexer(text).spanned() {
            match token {
                Ok(token) => tokens.push((token, span)),
                Err(()) => return Err(not_a_token(text, span)),
            }
        }
        let mut parser = Parser { text, tokens: &tokens, at: 0, fields: 0 };
        let root = parser.or(0)?;
        if parser.at < tokens.len() {
            return Err(parser.expected("`&&`, `||` or the end"));
        }
        let fields = parser.fields;
        Ok(Self { text: text.to_owned(), root, fields })
    }
}

fn not_a_token(text: &str, span: Range<usize>) -> ExpressionError {
    let shown = text.get(span.clone()).unwrap_or_default();
    let first = shown.chars().next().unwrap_or('?');
    let help = match first {
        '=' => Some("write `==`"),
        '&' => Some("write `&&`"),
        '|' => Some("write `||`"),
        '\'' => Some("texts stand between double quotes"),
        _ => None,
    };
    let message = match first {
        '"' => "this text has no end: a `\"` is missing".to_owned(),
        _ => format!("`{}` means nothing here", first),
    };
    ExpressionError { message, span, help: help.map(str::to_owned) }
}

struct Parser<'p> {
    text: &'p str,
    tokens: &'p [(Token, Range<usize>)],
    at: usize,
    fields: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    /// Where the next token is; behind the text, if there is none.
    fn span(&self) -> Range<usize> {
        let end = self.text.len();
        self.tokens.get(self.at).map_or(end..end, |(_, span)| span.clone())
    }

    fn shown(&self) -> &str {
        self.text.get(self.span()).unwrap_or_default()
    }

    fn take(&mut self, token: &Token) -> bool {
        let is = self.peek() == Some(token);
        self.at += usize::from(is);
        is
    }

    fn expected(&self, what: &str) -> ExpressionError {
        let found = match self.peek() {
            None => "the expression ends".to_owned(),
            Some(_) => format!("there is `{}`", self.shown()),
        };
        let message = format!("{found} where {what} should be");
        ExpressionError { message, span: self.span(), help: None }
    }

    fn or(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        let mut nodes = vec![self.and(depth)?];
        while self.take(&Token::Or) {
            nodes.push(self.and(depth)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Or(nodes) })
    }

    fn and(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        let mut nodes = vec![self.not(depth)?];
        while self.take(&Token::And) {
            nodes.push(self.not(depth)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::And(nodes) })
    }

    fn not(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        if depth > MAX_DEPTH {
            let message = format!("this is nested more than {MAX_DEPTH} deep");
            return Err(ExpressionError { message, span: self.span(), help: None });
        }
        if self.take(&Token::Not) {
            return Ok(Node::Not(Box::new(self.not(depth + 1)?)));
        }
        if self.take(&Token::Open) {
            let node = self.or(depth + 1)?;
            return match self.take(&Token::Close) {
                true => Ok(node),
                false => Err(self.expected("`)`")),
            };
        }
        self.test()
    }

    fn test(&mut self) -> Result<Node, ExpressionError> {
        let calls = self.tokens.get(self.at + 1).is_some_and(|(token, _)| *token == Token::Open);
        if calls && self.peek() == Some(&Token::Name) {
            if self.shown() != "exists" {
                let mut error = self.expected("a field");
                error.help = Some("the one function is `exists(field)`".to_owned());
                return Err(error);
            }
            self.at += 2;
            let field = self.field()?;
            return match self.take(&Token::Close) {
                true => Ok(Node::Exists(field)),
                false => Err(self.expected("`)`")),
            };
        }
        let field = self.field()?;
        let comparison = match self.peek() {
            Some(Token::Equal) => Comparison::Equal,
            Some(Token::Unequal) => Comparison::Unequal,
            Some(Token::Less) => Comparison::Less,
            Some(Token::AtMost) => Comparison::AtMost,
            Some(Token::More) => Comparison::More,
            Some(Token::AtLeast) => Comparison::AtLeast,
            Some(Token::Name) if self.shown() == "in" => {
                self.at += 1;
                return Ok(Node::In(field, self.list()?));
            }
            _ => return Ok(Node::Is(field)),
        };
        self.at += 1;
        let span = self.span();
        let literal = self.literal()?;
        let ordered = !matches!(comparison, Comparison::Equal | Comparison::Unequal);
        if ordered && matches!(literal, Literal::Truth(_)) {
            let message = "truths have no order".to_owned();
            let help = Some("compare them with `==`, or write the field alone".to_owned());
            return Err(ExpressionError { message, span, help });
        }
        Ok(Node::Compare(field, comparison, literal))
    }

    fn list(&mut self) -> Result<Vec<Literal>, ExpressionError> {
        if !self.take(&Token::OpenList) {
            let mut error = self.expected("`[`");
            error.help = Some("such as `in [\"US\", \"CA\"]`".to_owned());
            return Err(error);
        }
        let mut literals = vec![self.literal()?];
        while self.take(&Token::Comma) {
            literals.push(self.literal()?);
        }
        match self.take(&Token::CloseList) {
            true => Ok(literals),
            false => Err(self.expected("`,` or `]`")),
        }
    }

    fn field(&mut self) -> Result<Field, ExpressionError> {
        let first = self.span();
        if self.peek() != Some(&Token::Name) || matches!(self.shown(), "true" | "false" | "in") {
            let literal = matches!(
                self.peek(),
                Some(Token::Text | Token::Number | Token::Digits | Token::Name)
            );
            let mut error = self.expected("a field");
            error.help = literal
                .then(|| "a field stands first, what it is compared with behind it".to_owned());
            return Err(error);
        }
        let mut steps = vec![Step::Key(self.shown().to_owned())];
        self.at += 1;
        while self.take(&Token::Dot) {
            self.steps(&mut steps)?;
        }
        let end = self.tokens.get(self.at - 1).map_or(first.end, |(_, span)| span.end);
        let number = self.fields;
        self.fields += 1;
        Ok(Field { steps, span: first.start..end, number })
    }

    fn steps(&mut self, steps: &mut Vec<Step>) -> Result<(), ExpressionError> {
        let shown = self.shown().to_owned();
        let index = |digits: &str| digits.parse().ok().map(Step::Index);
        match self.peek() {
            Some(Token::Name) => steps.push(Step::Key(shown)),
            Some(Token::Text) => steps.push(Step::Key(self.unquoted()?)),
            Some(Token::Digits) => match index(&shown) {
                Some(step) => steps.push(step),
                None => return Err(self.expected("an index that a list can have")),
            },
            // `a.0.1` reads as a number where two indices are meant.
            Some(Token::Number) if shown.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
                for digits in shown.split('.') {
                    match index(digits) {
                        Some(step) => steps.push(step),
                        None => return Err(self.expected("an index that a list can have")),
                    }
                }
            }
            _ => return Err(self.expected("a name or an index")),
        }
        self.at += 1;
        Ok(())
    }

    fn literal(&mut self) -> Result<Literal, ExpressionError> {
        let shown = self.shown().to_owned();
        let literal = match self.peek() {
            Some(Token::Text) => Literal::Text(self.unquoted()?),
            Some(Token::Digits | Token::Number) => match shown.parse::<f64>() {
                Ok(number) if number.is_finite() => Literal::Number(number),
                _ => return Err(self.expected("a finite number")),
            },
            Some(Token::Name) if shown == "true" => Literal::Truth(true),
            Some(Token::Name) if shown == "false" => Literal::Truth(false),
            other => {
                let name = matches!(other, Some(Token::Name));
                let mut error = self.expected("a text, a number, `true` or `false`");
                error.help = name.then(|| format!("a text stands between quotes: `\"{shown}\"`"));
                return Err(error);
            }
        };
        self.at += 1;
        Ok(literal)
    }

    /// The text between the quotes of the next token.
    fn unquoted(&self) -> Result<String, ExpressionError> {
        let shown = self.shown();
        let inner = shown.get(1..shown.len().saturating_sub(1)).unwrap_or_default();
        let mut out = String::with_capacity(inner.len());
        let mut chars = inner.chars();
        while let Some(char) = chars.next() {
            out.push(match char {
                '\\' => match chars.next() {
                    Some(escaped @ ('"' | '\\')) => escaped,
                    _ => {
                        let mut error = self.expected("a text");
                        error.message = "only `\\\"` and `\\\\` can stand behind a `\\`".to_owned();
                        return Err(error);
                    }
                },
                char => char,
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_wrong_has_a_place_and_what_to_do() {
        for (text, span, message, help) in [
            ("", 0..0, "the expression ends where a field should be", None),
            ("a ==", 4..4, "the expression ends where a text, a number", None),
            ("a = 1", 2..3, "`=` means nothing", Some("write `==`")),
            ("a & b", 2..3, "`&` means nothing", Some("write `&&`")),
            ("a == 'x'", 5..6, "`'` means nothing", Some("texts stand between double quotes")),
            ("a == \"x", 5..7, "has no end", None),
            ("a == US", 5..7, "there is `US`", Some("a text stands between quotes: `\"US\"`")),
            ("\"US\" == a", 0..4, "where a field should be", Some("a field stands first")),
            ("(a == 1", 7..7, "where `)` should be", None),
            ("a == 1 b", 7..8, "where `&&`, `||` or the end", None),
            ("a in 1", 5..6, "where `[` should be", Some("such as `in")),
            ("a in []", 6..7, "where a text", None),
            ("a in [1 2]", 8..9, "where `,` or `]`", None),
            ("a < true", 4..8, "truths have no order", Some("compare them with `==`")),
            ("present(a)", 0..7, "where a field", Some("the one function is `exists(field)`")),
            ("a..b", 2..3, "where a name or an index", None),
            ("a.-1 == 2", 2..4, "where a name or an index", None),
            ("a == \"\\n\"", 5..9, "can stand behind", None),
            ("a.99999999999999999999999", 2..25, "an index that a list can have", None),
            ("a == 1e999", 5..10, "a finite number", None),
        ] {
            let error = Expression::parse(text).expect_err(text);
            assert_eq!(error.span, span, "{text}: {error}");
            assert!(error.message.contains(message), "{text}: {error}");
            match help {
                Some(help) => assert!(
                    error.help.as_deref().is_some_and(|h| h.starts_with(help)),
                    "{text}: {error:?}"
                ),
                None => assert_eq!(error.help, None, "{text}"),
            }
        }
        let deep = format!("{}a", "!".repeat(100));
        assert!(Expression::parse(&deep).unwrap_err().message.contains("64 deep"));
        assert!(Expression::parse(&"a".repeat(5000)).is_err());
    }

    #[test]
    fn fields_are_ways_through_maps_and_lists() {
        let parsed = Expression::parse("subdivisions.0.names.\"pt \\\"BR\\\"\" == \"x\"").unwrap();
        let Node::Compare(field, Comparison::Equal, Literal::Text(_)) = parsed.root else {
            panic!()
        };
        let key = |key: &str| Step::Key(key.to_owned());
        assert_eq!(
            field.steps,
            [key("subdivisions"), Step::Index(0), key("names"), key("pt \"BR\"")]
        );
        assert_eq!(field.span, 0..32);
        let Node::Is(field) = Expression::parse("a.0.1").unwrap().root else { panic!() };
        assert_eq!(field.steps, [key("a"), Step::Index(0), Step::Index(1)]);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"[a.0"=!<>&|()\[\], \\é-]{0,60}|\PC{0,40}"#) {
            if let Err(error) = Expression::parse(&text) {
                prop_assert!(error.span.end <= text.len() && error.span.start <= error.span.end);
                prop_assert!(text.get(error.span).is_some());
            }
        }
    }
}
