//! Licence expressions: `MIT OR (Apache-2.0 WITH LLVM-exception AND BSD-3-Clause)`, and the old
//! form `MIT/Apache-2.0`.

use anyhow::{Context, bail};

/// Whether the licences that `allowed` accepts satisfy the expression.
pub fn satisfied(expression: &str, allowed: &dyn Fn(&str) -> bool) -> anyhow::Result<bool> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let result = any(&mut words, allowed)?;
    match words.next() {
        None => Ok(result),
        Some(word) => bail!("{word} was not expected"),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> anyhow::Result<bool> {
    let mut result = all(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        result |= all(words, allowed)?;
    }
    Ok(result)
}

fn all(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> anyhow::Result<bool> {
    let mut result = one(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words, allowed)?;
    }
    Ok(result)
}

fn one(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> anyhow::Result<bool> {
    let word = words.next().context("it ends too early")?;
    if word == "(" {
        let result = any(words, allowed)?;
        return match words.next() {
            Some(")") => Ok(result),
            _ => bail!("a bracket is not closed"),
        };
    }
    if matches!(word, ")" | "AND" | "OR" | "WITH") {
        bail!("{word} stands where a licence should");
    }
    if words.next_if_eq(&"WITH").is_some() {
        let exception = words.next().context("no exception follows WITH")?;
        return Ok(allowed(&format!("{word} WITH {exception}")));
    }
    Ok(allowed(word))
}

#[cfg(test)]
mod tests {
    use super::satisfied;

    fn check(expression: &str) -> Option<bool> {
        satisfied(expression, &|licence| {
            matches!(licence, "MIT" | "ISC" | "Apache-2.0 WITH LLVM-exception")
        })
        .ok()
    }

    #[test]
    fn expressions_follow_precedence_and_brackets() {
        assert_eq!(check("MIT"), Some(true));
        assert_eq!(check("GPL-2.0"), Some(false));
        assert_eq!(check("GPL-2.0/MIT"), Some(true));
        assert_eq!(check("GPL-2.0 AND GPL-3.0 OR MIT"), Some(true));
        assert_eq!(check("GPL-2.0 AND (GPL-3.0 OR MIT)"), Some(false));
        assert_eq!(check("(MIT OR GPL-2.0) AND ISC"), Some(true));
        assert_eq!(check("Apache-2.0 WITH LLVM-exception"), Some(true));
        assert_eq!(check("Apache-2.0"), Some(false));
    }

    #[test]
    fn broken_expressions_are_errors() {
        for text in ["", "OR", "(MIT", "MIT)", "MIT WITH", "MIT ISC", "MIT AND"] {
            assert_eq!(check(text), None, "{text}");
        }
    }
}
