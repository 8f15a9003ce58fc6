"""Operations that have a plain and a compiled implementation."""
