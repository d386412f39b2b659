use regex::Regex;

use super::AddedValue;

/// `prefix_rewrite`, `regex_rewrite`, `path_rewrite_policy`, `path_rewrite`.
#[derive(Debug, Clone, Default)]
pub enum PathRewrite {
    /// It stays.
    #[default]
    None,
    /// Replaces what the path match consumed.
    Prefix(Box<str>),
    /// Replaces every match in the path.
    Regex(Box<RegexRewrite>),
    /// Made of what the variables of the match's template matched.
    Template(Vec<TemplatePiece>),
    /// Made of what formats can tell of the request; an empty one is none.
    Format(AddedValue),
}

/// `RegexMatchAndSubstitute`.
#[derive(Debug, Clone)]
pub struct RegexRewrite {
    /// What is replaced, wherever it stands.
    pub pattern: Regex,
    /// By what.
    pub substitution: Vec<SubstitutionPiece>,
}

impl PartialEq for RegexRewrite {
    fn eq(&self, other: &RegexRewrite) -> bool {
        (self.pattern.as_str(), &self.substitution) == (other.pattern.as_str(), &other.substitution)
    }
}

/// A piece of a substitution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubstitutionPiece {
    /// Text.
    Literal(Box<str>),
    /// What the group of this number matched; 0: the whole match.
    Group(usize),
}

/// A piece of a template rewrite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplatePiece {
    /// Text.
    Literal(Box<str>),
    /// What the variable of this name matched.
    Variable(Box<str>),
}

impl RegexRewrite {
    /// `text` with every match replaced.
    pub fn apply(&self, text: &str) -> String {
        let replace = |captures: &regex::Captures<'_>| {
            let pieces = self.substitution.iter().map(|piece| match piece {
                SubstitutionPiece::Literal(text) => text,
                SubstitutionPiece::Group(number) => captures.get(*number).map_or("", |group| group.as_str()),
            });
            pieces.collect::<String>()
        };
        self.pattern.replace_all(text, replace).into_owned()
    }
}
