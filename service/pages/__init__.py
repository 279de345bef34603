"""What people see: sign-in, consent, sign-out, errors, and the page of their own account. No script anywhere."""
